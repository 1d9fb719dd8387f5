"""`python -m lora_one`: the `lora-one` command."""

from .cli.commands import main

main()
