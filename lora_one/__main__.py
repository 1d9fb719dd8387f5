"""`python -m lora_one`: the `lora-one` command."""

from .cli import main

main()
