"""Policy-free hardware: one module for each device (spec S6), pure state and transitions."""
