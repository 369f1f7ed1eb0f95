"""Roles: what a weight is for, in the terms that recipes and tables use."""

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
    """`roles` for a person, a group's name in place of all of its members: expert, attention."""
    named = [name for name in ROLE_GROUPS if name != "*" and set(ROLE_GROUPS[name]) <= set(roles)]
    grouped = {role: name for name in named for role in ROLE_GROUPS[name]}
    return list(dict.fromkeys(grouped.get(role, role) for role in roles))
