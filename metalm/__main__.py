"""`python -m metalm`, which torchrun and deepspeed start."""

from metalm.cli import main

main()
