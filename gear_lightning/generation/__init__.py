"""From messages to sampled tokens: chat templates, engines, budgets."""
