"""`python -m lora_one` runs the `lora-one` command."""

from .cli.commands import main

main()
