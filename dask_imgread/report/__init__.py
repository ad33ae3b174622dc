"""Pages and pictures of a job's output."""
