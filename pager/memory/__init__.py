"""Memory: byte sizes as people write them, what the machine has, what a model needs, and the plan made of them."""
