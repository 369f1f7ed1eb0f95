"""Choosing tiers: recipes (and later budgets) in, a plan out. Nothing is read or written here."""
