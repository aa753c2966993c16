"""The parts of a graph that a pass sees, without a graph library: sites, views, layouts, kinds."""
