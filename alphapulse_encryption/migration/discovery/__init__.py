"""Which columns look sensitive, by name and by sampled values; not what is done to them."""
