//! Scenarios in real guests. One program, so that two guests can run at any time: see `zpod_e2e::slot`.

mod block;
mod busy;
mod disk;
mod fail_closed;
mod growth;
mod lifecycle;
mod pod;
mod refusals;
