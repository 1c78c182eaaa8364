"""Products: the CPU kernel of every processor class against torch's products with frozen weights."""
