"""`python -m lora_fx_light`."""

import sys

from lora_fx_light import main

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which may hold files of others, such as a click.py

main()
