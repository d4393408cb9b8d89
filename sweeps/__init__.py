"""Many trials: the plan, the search, the schedule, the workers, the store and the command line. One trial is `llmft`'s."""
