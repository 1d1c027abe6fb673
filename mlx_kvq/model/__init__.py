"""What a spec does to a model: the plan, its report, and switching it on and off."""
