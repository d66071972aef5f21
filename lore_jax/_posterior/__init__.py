"""The posterior of users over the prior's atoms; pure functions of arrays."""
