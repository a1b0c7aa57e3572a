"""Views of many runs: a leaderboard as CSV and Markdown, a web page, a wandb run. They read run directories, without torch."""
