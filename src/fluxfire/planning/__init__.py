"""From what a user asks for to a plan, or to the reason why there is none."""
