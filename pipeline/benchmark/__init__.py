"""The benchmark of methods: a sequence of takedowns on one model, measured after every step; see `runner`."""
