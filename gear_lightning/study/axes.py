"""What learning curves can be drawn over: axis -> the metric that counts it."""

AXES = {"iterations": None, "rollouts": "perf/rollouts", "tokens": "perf/sampled_tokens", "seconds": "perf/seconds"}
