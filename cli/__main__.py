"""`python -m lora_fx.cli`."""

from lora_fx.cli.common import main

main()
