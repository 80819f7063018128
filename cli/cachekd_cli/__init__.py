"""The `cachekd` command."""
