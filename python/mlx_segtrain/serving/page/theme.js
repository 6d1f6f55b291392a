// The theme that was chosen, before anything is drawn; without one it is the system's.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
