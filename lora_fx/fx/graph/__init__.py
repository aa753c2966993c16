"""The torch.fx side of the IR: op table, data flow, sites, emitter and idioms."""
