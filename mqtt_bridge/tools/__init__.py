"""What stands around the bridge: the demo and its servers, the simulator, tapes. The bridge itself needs none of it."""
