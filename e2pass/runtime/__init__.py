"""What a transformed model needs while it runs: own operators, lowered regions, gates, merges, the module itself."""
