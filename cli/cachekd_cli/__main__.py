"""Run the command as a module: `accelerate launch -m cachekd_cli dump ...`, `python -m cachekd_cli`."""

from cachekd_cli.main import main

main()
