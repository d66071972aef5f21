"""The command `lore`, of the extra `cli`; `import lore_jax` does not import it."""
