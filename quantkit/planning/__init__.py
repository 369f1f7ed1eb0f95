"""Choose tiers: recipes, or budgets and a profile, in; a plan out. No model runs here."""
