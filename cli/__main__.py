"""`python -m lora_fx.cli`."""

from lora_fx.cli.run import main

main()
