//! A policy of one's own: the least share of its work done goes first, so that all models of a search can be compared at any moment.
//!
//! A policy is a pure function from a view of models and devices to a choice. Here it is asked by hand, on one device.

use hydra::sched::{Claim, DeviceView, ModelId, ModelView, Policy, View};

/// All models side by side: each has all its seconds here, as they were at the start.
struct EvenProgress {
    total_secs: Vec<f64>,
}

impl Policy for EvenProgress {
    fn name(&self) -> &str {
        "even-progress"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let left = |model: &ModelView| model.remaining_secs / self.total_secs[usize::from(model.id)];
        // Of equals max_by takes the last, and the lowest id is to win.
        let first = view.candidates().max_by(|a, b| left(a).total_cmp(&left(b)).then(b.id.cmp(&a.id)));
        first.map(|model| model.id)
    }
}

/// Three models of 2, 4 and 8 units of a second, until two units of each of the longer ones are left.
pub fn main() {
    let policy = EvenProgress { total_secs: vec![2.0, 4.0, 8.0] };
    let model = |id| ModelView {
        id,
        claim: Claim::Idle,
        pinned: None,
        remaining_secs: policy.total_secs[usize::from(id)],
        remaining_bytes: 0,
        shard: 0,
        unit_secs: 1.0,
        weight_bytes: 0,
        boundary_bytes: 0,
        leave_bytes: 0,
        last_device: None,
    };
    let mut models = [0, 1, 2].map(model);
    let device = DeviceView {
        id: 0,
        speed: 1.0,
        held: vec![],
        claimed: 0,
        busy_secs: 0.0,
        h2d_bytes_per_sec: 16e9,
        h2d_secs: 0.0,
    };
    let mut order = Vec::new();
    for choices in 0..7 {
        let view = View {
            device: 0,
            choices,
            last: order.last().copied(),
            models: &models,
            devices: std::slice::from_ref(&device),
            shared_bytes_per_sec: None,
        };
        let chosen = policy.choose(&view).expect("all models are idle");
        models[usize::from(chosen)].remaining_secs -= 1.0;
        order.push(chosen);
    }
    println!("{} takes {order:?}", policy.name());
    // After seven of fourteen units each model is half done.
    assert_eq!(order, [0, 1, 2, 2, 1, 2, 2]);
    assert!(models.iter().all(|model| model.remaining_secs == policy.total_secs[usize::from(model.id)] / 2.0));
}
