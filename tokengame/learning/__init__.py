"""Learning a policy by multi-agent PPO: rewards, sampled games, updates, runs; and fine-tuning through a policy."""
