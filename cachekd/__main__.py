"""Run the command as a module: `python -m cachekd`, `accelerate launch -m cachekd dump ...`."""

from cachekd_cli.main import main

main()
