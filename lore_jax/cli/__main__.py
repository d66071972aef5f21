"""`python -m lore_jax.cli` is the command `lore`."""

from lore_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
