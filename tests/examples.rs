//! Runs the examples, which assert what they show.

#[path = "../examples/01_graph_by_hand.rs"]
mod graph_by_hand;
#[path = "../examples/02_own_model.rs"]
mod own_model;
#[path = "../examples/03_under_a_budget.rs"]
mod under_a_budget;

#[path = "../examples/04_custom_op/main.rs"]
mod custom_op;
#[path = "../examples/06_denoising.rs"]
mod denoising;
#[path = "../examples/08_fine_tuning.rs"]
mod fine_tuning;
#[path = "../examples/07_own_loop.rs"]
mod own_loop;
#[path = "../examples/05_own_policy.rs"]
mod own_policy;

#[test]
fn custom_op_runs() {
    custom_op::main().expect("the example runs");
}

#[test]
fn graph_by_hand_runs() {
    graph_by_hand::main().expect("the example runs");
}

#[test]
fn own_model_runs() {
    own_model::main().expect("the example runs");
}

#[test]
fn under_a_budget_runs() {
    under_a_budget::main().expect("the example runs");
}

#[test]
fn own_policy_runs() {
    own_policy::main().expect("the example runs");
}

#[test]
fn denoising_runs() {
    denoising::main().expect("the example runs");
}

#[test]
fn own_loop_runs() {
    own_loop::main().expect("the example runs");
}

#[test]
fn fine_tuning_runs() {
    fine_tuning::main().expect("the example runs");
}
