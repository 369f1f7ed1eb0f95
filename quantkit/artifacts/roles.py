"""Roles: the function of a weight in the model, as recipes and tables name it."""

EXPERT_ROLES = ("expert_gate", "expert_up", "expert_down")
ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("mlp_gate", "mlp_up", "mlp_down")
ROLES = ("embedding", *ATTENTION_ROLES, "router", *EXPERT_ROLES, *MLP_ROLES, "other", "lm_head")
ROLE_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION_ROLES,
    "expert": EXPERT_ROLES,
    "mlp": MLP_ROLES,
    "*": ROLES,
}


def group_roles(roles: tuple[str, ...]) -> list[str]:
    """Return `roles` with complete groups replaced by their names, such as expert or attention."""
    named = [name for name in ROLE_GROUPS if name != "*" and set(ROLE_GROUPS[name]) <= set(roles)]
    grouped = {role: name for name in named for role in ROLE_GROUPS[name]}
    return list(dict.fromkeys(grouped.get(role, role) for role in roles))
