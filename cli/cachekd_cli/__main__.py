"""For `accelerate launch -m cachekd_cli dump ...` and `python -m cachekd_cli`."""

from cachekd_cli.main import main

main()
