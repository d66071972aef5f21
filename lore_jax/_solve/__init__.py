"""Certified convex solvers on the simplex; pure functions of arrays."""
