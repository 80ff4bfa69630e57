"""The tiers of one worker: what is resident in it, and how contexts move between tiers."""
