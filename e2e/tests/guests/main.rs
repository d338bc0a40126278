//! Scenarios in real guests. One program, so that two guests can run at any time: see `zpod_e2e::slot`.

mod access;
mod attributes;
mod block;
mod busy;
mod clones;
mod database;
mod disk;
mod encryption;
mod fail_closed;
mod growth;
mod image;
mod lifecycle;
mod lost_pool;
mod memory;
mod mirror;
mod pod;
mod refusals;
mod rollback;
mod runtimes;
mod schedule;
mod send;
mod snapdir;
mod template;
mod tenant;
