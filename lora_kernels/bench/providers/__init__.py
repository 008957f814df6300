"""The providers: this package, PEFT, addmm chains, compiled variants, a frozen floor."""
