"""One map of every parameter in Hugging Face tensor space: conversion, refit and export are built on it."""
