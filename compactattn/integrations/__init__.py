"""A module or package per engine that can run on compactattn; each is imported by itself and needs its engine."""
