"""The engine: requests, scheduling, sampling and the generation loop."""
