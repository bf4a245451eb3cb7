"""Rules: repair of a behaviour, learnt from a few call sites and proved on prompts that nobody wrote down."""
