"""The search: trained networks on the surface of a target, a model of them, and what it recommends."""
