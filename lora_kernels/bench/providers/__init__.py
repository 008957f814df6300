"""Who computes it: ours, PEFT, addmm chains, compiled ones, a frozen floor."""
