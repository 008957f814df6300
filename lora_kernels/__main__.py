"""`python -m lora_kernels` is `lora-kernels`."""

from lora_kernels.cli import main

raise SystemExit(main())
