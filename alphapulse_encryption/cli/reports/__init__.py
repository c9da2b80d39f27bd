"""How plan, status and discovery look at a terminal or as JSON; not what is in them."""
