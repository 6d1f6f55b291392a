// Sets the chosen theme before anything is drawn; the default is that of the system.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
