//! Phases and settings of a cycle.

use super::*;

#[test]
fn a_run_is_a_warm_start_and_cycles() {
    let config = CycleConfig { cycles: 2, ..CycleConfig::default() };
    let names: Vec<String> =
        config.phases().iter().map(|phase| format!("{}{}", phase.kind.name(), phase.cycle)).collect();
    assert_eq!(names, ["warm_gistnet0", "warm_lensnet0", "jt11", "jt21", "jt31", "jt12", "jt22", "jt32"]);
}

#[test]
fn an_ablation_leaves_one_module_out_from_the_start() {
    let config = CycleConfig { cycles: 1, ablation: true, ..CycleConfig::default() };
    let phases = config.phases();
    assert_eq!(phases.len(), 2 + 3 + 2 * (1 + 2) + 2);
    let warm: Vec<_> = phases.iter().filter(|phase| phase.cycle == 0).map(|phase| phase.without).collect();
    assert_eq!(warm, [None, None, Some(Group::Gistnet), Some(Group::Lensnet)]);
    for phase in phases {
        assert_ne!(phase.without, Some(phase.kind.module()), "{phase}");
    }
}

#[test]
fn what_is_drawn_in_a_phase_is_the_same_in_every_pass() {
    let config = CycleConfig { cycles: 2, ablation: true, ..CycleConfig::default() };
    let phases = config.phases();
    let own: Vec<&PhasePlace> = phases.iter().filter(|phase| phase.without.is_none()).collect();
    assert_eq!(own.iter().map(|phase| phase.number()).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    for phase in &phases {
        let twin = own.iter().find(|own| (own.kind, own.cycle) == (phase.kind, phase.cycle)).unwrap();
        assert_eq!(phase.number(), twin.number(), "{phase}");
    }
}

#[test]
fn contexts_rise_by_cycle_and_the_last_one_holds() {
    let config = CycleConfig { contexts: vec![512, 2048], cycles: 4, ..CycleConfig::default() };
    assert_eq!([0, 1, 2, 3, 4].map(|cycle| config.context_of(cycle)), [512, 512, 2048, 2048, 2048]);
    assert_eq!(config.longest(), 2048);
}

#[test]
fn what_a_phases_table_leaves_out_is_that_phases_default() {
    let config = CycleConfig::from_json(serde_json::json!({
        "warm_gistnet": { "steps": 5 },
        "jt3": { "optimizer": { "lr": 0.5 } },
        "jt2": { "labels": { "histories": 9 } },
    }))
    .unwrap();
    let own = CycleConfig::default();
    assert_eq!(config.warm_gistnet, GistPhase { steps: 5, ..own.warm_gistnet });
    assert_eq!(config.jt3.optimizer, OptimizerConfig { lr: 0.5, ..own.jt3.optimizer });
    assert_eq!(config.jt2.labels, LabelSettings { histories: 9, ..own.jt2.labels });
    let error = CycleConfig::from_json(serde_json::json!({ "jt3": { "step": 5 } })).unwrap_err();
    assert!(error.message.contains("jt3") && error.message.contains("step"), "{error}");
}

#[test]
fn phases_without_steps_are_left_out() {
    let mut config = CycleConfig { cycles: 1, ..CycleConfig::default() };
    config.warm_gistnet.steps = 0;
    config.jt3.steps = 0;
    let kinds: Vec<PhaseKind> = config.phases().iter().map(|phase| phase.kind).collect();
    assert_eq!(kinds, [PhaseKind::WarmLensnet, PhaseKind::Jt1, PhaseKind::Jt2]);
}
