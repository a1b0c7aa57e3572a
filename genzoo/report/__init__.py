"""Reports on many runs, without torch: a leaderboard as CSV and Markdown, a web page, a wandb run."""
