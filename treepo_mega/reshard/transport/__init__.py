"""How planned parcels travel between ranks: one protocol, two transports, and the choice between them for each pair."""
