"""models/wan"""
